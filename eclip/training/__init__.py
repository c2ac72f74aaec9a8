"""A training run: what must be there before it starts, its loop, its checkpoints and its folder. Its course:

    prepare.py      every check that can fail, the data, the tokenizer; takes the run folder and finds the checkpoint
                    that --resume continues
    build.py        the model, the feature cache of locked towers (feature_cache/), the loader
    trainer.py      puts them together with momentum.py and optim/, fills them from the checkpoint; then the loop
    step.py         a batch to its losses, as the one module that FSDP shards
    finite.py       ends the run before a step that is not a number
    metrics/        takes the numbers of a step to the console and to files
    validation.py   the loss of the val split, between steps
    checkpoint/     the run folder, what is saved there, how it is loaded and what a resume may change

How ranks meet, watch each other and are told to stop is in parallel/.
"""
