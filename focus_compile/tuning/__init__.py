"""The search for the cheapest options whose answers agree with the dense loop's."""
