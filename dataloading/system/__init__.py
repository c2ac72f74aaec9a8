"""What commands and workers need of the system: streams, one-line errors, locks, processes that die with a parent.

Each file stands for itself; import from the one that is meant (`workers` alone needs torch):
    command.py    a command line whose errors, Ctrl-C and SIGTERM are one line and a status
    console.py    `say` and `progress_bar`, whether or not somebody listens
    lock.py       `alone`: one process at a time
    memory.py     what this process may still take, within its containers
    parent.py     `die_with_parent`
    waiting.py    waits with a limit that name themselves
    workers.py    processes that make the items of a series ahead of need
"""
