"""More of a forget set: paraphrases, wrong answers and neighbours, from a chat server or by rules, each checked before it is kept."""
