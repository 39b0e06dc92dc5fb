"""Images in files: exports of images as OCI image layouts and docker archives, and imports of them."""
