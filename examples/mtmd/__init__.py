"""MTMD with the blocks of momentum_distill. Three files show it: model.py, objective.py, train.py.

Behind them, each folder using those before it: files, settings, data, results, runs, study.

What is added stands in one file: an encoder of text features in model.py (`FEATURE_ENCODERS`); a metric in
results/metrics.py (its function and `COLUMNS`); a modality in settings/config.py (`MODALITIES` and its two settings).
"""
