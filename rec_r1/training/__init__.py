"""The training itself: TRL's trainer with our rollouts, order of prompts and loss rows."""
