"""Build DeepSpeed's CPU Adam, which DeepSpeed compiles once per machine. Run with DS_ACCELERATOR=cpu."""

from deepspeed.accelerator import get_accelerator

from pipeline.distributed import remove_stale_lock

if __name__ == "__main__":
    remove_stale_lock()
    get_accelerator().create_op_builder("CPUAdamBuilder").load()
