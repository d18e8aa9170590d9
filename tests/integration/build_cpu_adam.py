"""DeepSpeed compiles its CPU Adam once a machine, with DS_ACCELERATOR=cpu: here."""

from deepspeed.accelerator import get_accelerator

if __name__ == "__main__":
    get_accelerator().create_op_builder("CPUAdamBuilder").load()
