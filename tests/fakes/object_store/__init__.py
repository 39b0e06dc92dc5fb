"""A blob store over an object store such as S3, to hold the `BlobStore` Protocol against."""
