// SPDX-License-Identifier: Apache-2.0
//! How much kernel memory do the maps of an object take, here and on the largest machine?
//!
//! Computed as the kernel allocates (kernel/bpf/hashtab.c `htab_map_alloc`, kernel/bpf/arraymap.c `array_map_alloc`),
//! so that the answer needs no privilege and holds for any number of CPUs.

use anyhow::Context;
use aya_obj::{Object, generated::bpf_map_type};

/// The number of CPUs that the budget is stated for.
pub const MANY_CPUS: usize = 256;

/// The budget of all maps together at [`MANY_CPUS`], in bytes.
pub const BUDGET: u64 = 32 << 20;

/// `sizeof(struct htab_elem)`: list node or freelist link, LRU node, hash, padding. 48 on every 64-bit kernel from 5.10.
const HASH_ELEMENT: u64 = 48;

/// `sizeof(struct bucket)`: list head and lock.
const HASH_BUCKET: u64 = 16;

/// Returns the bytes that an object's maps take on a machine with room for `cpus` CPUs.
///
/// # Errors
/// When the object cannot be parsed or has a map of a type that the sum does not know.
pub fn bytes(object: &[u8], cpus: usize) -> anyhow::Result<u64> {
    let object = Object::parse(object).context("parse the object")?;
    let sizes = object.maps.iter().map(|(name, map)| {
        one(
            map.map_type(),
            map.key_size(),
            map.value_size(),
            map.max_entries(),
            cpus as u64,
        )
        .with_context(|| {
            format!(
                "map {name} is of type {}, whose size is not known here",
                map.map_type()
            )
        })
    });
    sizes.sum()
}

fn one(kind: u32, key: u32, value: u32, entries: u32, cpus: u64) -> Option<u64> {
    let (key, value, entries) = (
        u64::from(key).next_multiple_of(8),
        u64::from(value).next_multiple_of(8),
        u64::from(entries),
    );
    const HASH: u32 = bpf_map_type::BPF_MAP_TYPE_HASH as u32;
    const PERCPU_HASH: u32 = bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH as u32;
    const ARRAY: u32 = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    const PROG_ARRAY: u32 = bpf_map_type::BPF_MAP_TYPE_PROG_ARRAY as u32;
    const PERCPU_ARRAY: u32 = bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32;
    let buckets = entries.next_power_of_two() * HASH_BUCKET;
    Some(match kind {
        // One spare element for each CPU, so that an update never waits for another CPU's.
        HASH => buckets + (entries + cpus) * (HASH_ELEMENT + key + value),
        PERCPU_HASH => buckets + entries * (HASH_ELEMENT + key + 8 + value * cpus),
        ARRAY | PROG_ARRAY => entries.max(1) * value,
        PERCPU_ARRAY => entries.max(1) * (8 + value * cpus),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signals::SIGNALS;

    #[test]
    fn all_maps_stay_within_the_budget_on_the_largest_machine() {
        let total: u64 = SIGNALS
            .iter()
            .flat_map(|signal| signal.objects)
            .map(|object| bytes(object, MANY_CPUS).expect("a known object"))
            .sum();
        assert!(total <= BUDGET, "{total} bytes at {MANY_CPUS} CPUs");
        assert!(total > 0);
    }

    #[test]
    fn only_spare_elements_depend_on_the_number_of_cpus() {
        let object = SIGNALS[0].objects[0];
        let (one, many) = (
            bytes(object, 1).expect("known"),
            bytes(object, 256).expect("known"),
        );
        assert!(many > one && many - one < 1 << 16, "{one} → {many}");
    }
}
