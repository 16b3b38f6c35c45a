"""What a certificate holds, and how anybody checks it: facts, chains of hashes, differences that mean nothing."""
