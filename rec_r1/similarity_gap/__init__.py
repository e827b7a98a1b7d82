"""The page of `rec-r1 similarity-gap`: how far similar texts are from what users choose next; and that of
`rec-r1 tuning-grid`: when pre-training on texts helps an encoder that is tuned on choices."""
