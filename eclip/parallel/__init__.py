"""The processes of a run: how they meet, share the work, watch each other, are told to stop, and end. A rank's life:

    torchrun.py     what a launcher says of its place, and what torchrun wants from it
    rendezvous.py   meets the others through a store of their own
    ranks.py        device, threads and process groups: `Ranks`, what the rest of the program knows of the others
    sharding.py     a step over ranks: DDP, FSDP2, or FSDP2 inside machines; settings.py: the flags of this and of
                    what is done to the model from outside before: recompute.py (checkpointing), then compiling.py
    gather.py       rows of all ranks: all that objectives ask for
    signals.py      stop signals: noted in the loop, raised elsewhere
    watch.py        signs of life, failures and stops of the others, outside collectives
    ending.py       one line, by one rank, and the exit status
    device.py       outside a run: the device that a user names

A loss that is not finite (training/finite.py) and a loader that stalls (dataloading) end a run by this way too.
"""
