"""Ranks, meshes, collectives, and how tensors lie on them. The only importer of torch.distributed."""
