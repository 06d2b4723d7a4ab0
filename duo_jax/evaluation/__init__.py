"""Evaluation of networks: held-out likelihood, judges of its texts, the few-step curve, the harness's tasks, and plots."""
