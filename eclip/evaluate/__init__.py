"""Transfer without fine-tuning: classification, retrieval and grounding of one run (`python -m eclip.evaluate`).

The way of an evaluation:
    __main__.py    flags -> evaluate_run; errors as one line
    run.py         opens the run, orders the tasks, writes RUN/evaluation.json and RUN/grounding.png
    inputs.py      what it is given, checked first: numbers, device, catalogue
    together.py    the evaluation at the end of a run: every rank encodes for rank 0
    extraction.py  one pass over the images -> features.py; how they are embedded is the objective's to say
    evaluator.py   what each task gets: Evaluator (a loaded run, how to run it) and Split (its features and facts)
    tasks/         what is measured, one task a file; its tools are metrics.py (rankings) and boxes.py (geometry)
    report/        tables, and the sheet of overlays with its lettering

A new task:
    1. tasks/NAME.py with `run(evaluator: Evaluator, split: Split) -> Iterator[tuple[str, Outcome]]`
    2. it yields names with a Table, with the reason why there is none (a str), or with overlays for the sheet
    3. numbers out of `split.features` by the tools above, always with a row for chance
    4. a line in TASKS (run.py), which orders the tables
    5. tests/evaluate/tasks/test_NAME.py, on features made by hand (made_features.py)
"""
