"""Text to batches.

corpus     settings → a `Plan`: which source, which tokenizer, how many tokens; and the `Corpus` that a run reads
text/      a `Source` has files; their pieces (lines, rows) become documents, which are plain strings
tokens/    a process encodes documents into `Shard`s and stores them, ahead of the run
rows       four shards are a `Window`, whose rows make a `Batch`
batches    which rows make the batch of each step, and of an evaluation
labelled   sentences with labels, and their batches
"""
