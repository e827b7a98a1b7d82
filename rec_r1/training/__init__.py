"""The training itself: TRL's trainer with the toolkit's rollouts, order of prompts, and selection of loss rows."""
