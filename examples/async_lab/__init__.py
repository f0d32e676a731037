"""A plain PyTorch trainer for asynchronous RL, small enough that a run takes some seconds on one core.

It shows on a CPU what VCPO is for: rollouts that are k steps stale make importance weights heavy-tailed, and
whether training survives them depends on the method and the learning rate.

    python -m examples.async_lab demo

    config.py      what a run is, and the JSON file it leaves
    tasks.py       the tasks, in a table
    model.py       a small transformer
    stack.py       several models' parameters in one tensor, and a sampler that decodes for all at once
    passes.py      the learner's forward and backward pass, by hand
    warm_start.py  the supervised model that every run starts from
    methods.py     the methods under comparison, in a table
    trainer.py     the loop: queue of stale rollouts, `vk.token_stats`, a method's loss, `vk.EssLearningRate`
    paced.py       a sampler and a learner process at their own pace
    race.py        their time to a target accuracy, in a table
    workers.py     runs on several processes, resumable
    export.py      all runs as one CSV file, and back
    display.py     the terminal: live progress and tables
    figures.py     the pictures
    cli.py         the commands
"""
