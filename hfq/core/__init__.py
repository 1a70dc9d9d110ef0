"""What a quantized weight *is*: specs, integer codes, scales, codebooks, bit packing. Imports torch only."""
