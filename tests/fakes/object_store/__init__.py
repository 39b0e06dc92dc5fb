"""A blob store over an object store such as S3. It checks that the `BlobStore` Protocol does not assume files."""
