"""Networks: backbones, and the heads, probes and segmentation network on them.

Public: `backbone` (`build_backbone`), `base` (`Backbone`), `fcn`, `heads`, `memory_format`
(`channels_last`), `names`, `probes` and `resnet` (`ResNet`); the package `detection`.
Imports: `pipelines`, and of `rotpred` distributed.
"""
