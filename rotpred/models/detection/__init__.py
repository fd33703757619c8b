"""Detectors on a backbone: Faster R-CNN C4 and Mask R-CNN with FPN.

Public: `rcnn`, `roi_heads` (`Detections`, `paste_masks`) and `rpn` (`Proposals`).
Imports: `pipelines`, and of `rotpred` models, distributed and files.
"""
