"""Models that are split over ranks with torch.distributed."""
