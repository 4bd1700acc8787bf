"""AdaFRUGAL: memory-efficient training of language models. The optimizer is in `adafrugal.optim`."""
