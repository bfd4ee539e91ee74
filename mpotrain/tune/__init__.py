"""Fine-tuning of pretrained encoders: tasks, their files, their metrics, one start of a run."""
