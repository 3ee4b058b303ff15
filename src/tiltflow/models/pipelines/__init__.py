"""The families of diffusers pipelines: one file each, which says what is particular to it. `docs/text-to-image.md` shows how to
add one."""
