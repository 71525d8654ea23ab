"""What ops of one family are made of: losses on rows of logits, those from hidden states, and lists
of tensors.
"""
