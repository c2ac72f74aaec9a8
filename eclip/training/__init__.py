"""A training run: what must be there before it starts, its loop, its checkpoints and its folder. Its course:

    prepare.py      every check that can fail, the data, the tokenizer; takes the run folder and finds the checkpoint
                    that --resume continues. starting/: sizes from the catalogue, --start-from, memory and disk
    build.py        the model, the feature cache of locked towers (feature_cache/), the loader
    compute.py      makes the step compute as its flags say: checkpointing, compilation, sharding
    trainer.py      puts these together with momentum.py and optim/, fills them from the checkpoint; then the loop
    feeding.py      batches, with their random draws and cached features, to the device
    step.py         the stages of a forward pass, as the one module that is sharded
    accumulation.py their order when a batch is taken in micro-batches
    flight.py       the numbers of a step on their way from the device, which is not waited for
    finite.py       counts steps that were skipped for a number that is none; many in a row end the run
    metrics/        takes the numbers to the console and to files
    validation.py   the loss of the val split, between steps
    checkpoint/     the run folder, what is saved there, how it is loaded and what a resume may change

README.md tells a step in the same order. How ranks meet, watch each other and are told to stop is in parallel/.
"""
