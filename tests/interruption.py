"Interrupt a training run at a step of one's choice, as Ctrl-C would."


def interrupt_at(trainer, step: int):
    "Raise KeyboardInterrupt in place of a training step, counted from 1."
    take, taken = trainer.train_step, []

    def stop(*args):
        taken.append(1)
        if len(taken) == step:
            raise KeyboardInterrupt
        take(*args)

    trainer.train_step = stop
