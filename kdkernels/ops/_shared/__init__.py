"""What ops of one family are made of: losses on rows of logits, and those from hidden states."""
