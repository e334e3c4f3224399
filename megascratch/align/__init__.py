"""Alignment: from a pretrained model to an assistant, each method an objective and a source of batches."""
