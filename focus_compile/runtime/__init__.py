"""What a call runs: dispatch, the guard, trajectories, and what is kept of them."""
