"""The page of `rec-r1 similarity-gap`: how far similar texts are from what users choose next."""
