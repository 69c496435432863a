"""The tables and figures of the papers, made again: one file a family of targets, and what they share.

    catalogue.py   the targets, and the run from names to a report
    core.py        a trial, the file of results it is kept in, the runner
    report.py      sections as Markdown, HTML and JSON            plots.py     the pictures
    accuracy.py    what fine-tuning reaches: one trial a task, method, cache and seed
    features.py    Skip2-LoRA, Tables 3 and 4, Fig. 3             images.py    the poster; InstantFT, Figs. 1 and 7a
    timing.py      Skip2-LoRA, Tables 2, 6 and 7, §4.3; InstantFT, Fig. 7b
    tinytl.py      Skip2-LoRA, Table 5, in PyTorch, which nothing else here needs
    hardware.py    InstantFT, Fig. 7c, §5.3: the open core, synthesised and simulated
    counting.py    InstantFT, Table 1 and §5.5: counted, not run  sensors.py   Skip2-LoRA, Fig. 4

A target is two functions: the trials it needs, and the section of the report made from their numbers. What the papers
print stands beside it, in the same file; what our copies of them lack is called `NOT_HERE`.
"""
