"""Hugging Face folders by tensor name, without a model.

folder    reads lazily, writes shard by shard
naming    checkpoint names against fused parameters
shards    safetensors by their bytes; float8 blocks
sizes     how large a checkpoint is, from its headers
diff      which tensors differ between two folders
"""
