"""From text to batches.

corpus     make a `Plan` from settings (source, tokenizer, number of tokens); the `Corpus` that a run reads
text/      a `Source` has files; their pieces (lines, rows) are parsed into documents, which are plain strings
tokens/    a separate process encodes documents into `Shard`s and stores them, ahead of the run
rows       cut a `Window` of four shards into rows; rows make a `Batch`
batches    choose the rows of each step's batch, and of an evaluation
labelled   sentences with labels, and their batches
overview   report on the prepared tokens
"""
