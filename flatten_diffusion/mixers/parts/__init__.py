"""What mixers share: local convolutions, feature maps, windows, the join with text, regressions."""
