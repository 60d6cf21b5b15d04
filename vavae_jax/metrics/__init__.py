"""Metrics: arrays -> numbers. Nothing here knows a model, a file or a data set.

`pixels` compares images one by one (PSNR, SSIM); `distribution` compares sets of features
(Frechet distance, Inception score, precision and recall).
"""
