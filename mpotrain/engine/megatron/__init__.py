"""The Megatron engine: tensor, sequence, pipeline, context and expert parallelism."""
