"""DeepSpeed compiles its CPU communication and its CPU Adam once a machine, with DS_ACCELERATOR=cpu: here."""

from deepspeed.accelerator import get_accelerator

if __name__ == "__main__":
    for kernel in ("ShareMemComm", "CPUAdam"):
        get_accelerator().create_op_builder(f"{kernel}Builder").load()
