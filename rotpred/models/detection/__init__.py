"""Detectors on a backbone: Faster R-CNN C4 and Mask R-CNN with FPN.

Public: `rcnn`, `masks` (`paste_masks`), `roi_heads` (`Detections`) and `settings` (`Proposals`).
Imports: `pipelines`, and of `rotpred` models, distributed and files.
"""
