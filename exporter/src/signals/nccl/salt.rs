// SPDX-License-Identifier: Apache-2.0
//! What is a communicator called where everybody can read it?
//!
//! NCCL's own number of a communicator is what its ranks are joined by in the kernel half. Whoever reads it could say that they are ranks of
//! it, and make others seem to wait. So pages have a keyed hash of it, with a key that all nodes of a cluster share, since rules join nodes by
//! the name.

use std::{fs::File, io::Read, path::Path, sync::Arc};

use ring::hmac;

/// The least and the most bytes of a salt.
const LEAST: usize = 16;
const MOST: u64 = 4096;

/// The key of a cluster.
#[derive(Clone, Debug)]
pub struct Salt(Arc<hmac::Key>);

impl Salt {
    /// Reads a file; white space at its end does not count.
    ///
    /// # Errors
    /// One line, where it cannot be read or has less than 16 or more than 4096 bytes.
    pub fn read(path: &str) -> Result<Self, String> {
        let read = || {
            let mut bytes = Vec::new();
            let file = File::open(Path::new(path))?;
            file.take(MOST + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|error: std::io::Error| error.to_string())?;
        let salt = bytes.trim_ascii_end();
        if salt.len() < LEAST || salt.len() as u64 > MOST {
            return Err(format!(
                "a salt has {LEAST} to {MOST} bytes, and is the same on all nodes: head -c 32 /dev/urandom | base64 makes one"
            ));
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, salt);
        Ok(Self(Arc::new(key)))
    }

    /// The name of a communicator: the first eight bytes of the HMAC-SHA256 of its number.
    pub fn name(&self, number: u64) -> u64 {
        let tag = hmac::sign(&self.0, &number.to_be_bytes());
        let first = tag.as_ref().first_chunk();
        u64::from_be_bytes(*first.expect("a tag of 32 bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_nothing_of_the_number_and_is_the_same_with_the_same_salt() {
        let folder = tempfile::tempdir().expect("a folder");
        let salt = |text: &str| {
            let path = folder.path().join("salt");
            std::fs::write(&path, text).expect("written");
            Salt::read(path.to_str().expect("text"))
        };
        let one = salt("0123456789abcdef").expect("long enough");
        let same = salt("0123456789abcdef\n").expect("long enough");
        let other = salt("0123456789abcdeg").expect("long enough");
        // printf '\x00\x00\x00\x00\x00\x00\x0a\xbc' | openssl dgst -sha256 -hmac 0123456789abcdef
        assert_eq!(format!("{:016x}", one.name(0xabc)), "bdd870dd0b5ab8c2");
        assert_eq!(one.name(0xabc), same.name(0xabc));
        assert_ne!(one.name(0xabc), other.name(0xabc));
        assert_ne!(one.name(0xabc), one.name(0xabd));
        for bad in [
            "",
            "0123456789abcde",
            "0123456789abcde\n\n\n",
            &"x".repeat(5000),
        ] {
            assert!(salt(bad).is_err(), "{bad}");
        }
        assert!(Salt::read("/nowhere").is_err());
    }
}
