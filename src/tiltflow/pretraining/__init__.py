"""Base models and classifiers from data: `tiltflow pretrain`"""
