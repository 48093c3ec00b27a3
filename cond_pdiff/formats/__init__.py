"""LoRA files of other tools, single safetensors files in the keys of diffusers, kohya and ComfyUI: read, and written."""
