"""Methods at equal cost on a pretrained DINOv2 ViT-S/14 and real images."""
