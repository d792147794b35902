// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! What is noted under a key?

use aya_ebpf::{bindings::BPF_NOEXIST, maps::HashMap};
use exporter_common::Loss;

/// Returns a copy of the value of a key.
#[inline(always)]
pub fn value<K, V: Copy>(map: &HashMap<K, V>, key: &K) -> Option<V> {
    // SAFETY: values of preallocated maps live as long as a program runs. What another CPU writes meanwhile is some value, too.
    unsafe { map.get(key) }.copied()
}

/// Removes a key and returns its value.
#[inline(always)]
pub fn remove<K, V: Copy>(map: &HashMap<K, V>, key: &K) -> Option<V> {
    let value = value(map, key)?;
    let _ = map.remove(key);
    Some(value)
}

/// Returns the value of `key`, inserted as `zero` when absent.
///
/// Two CPUs may race to insert: one is told that the key exists and finds the other's entry.
#[inline(always)]
pub fn entry<K, V>(map: &HashMap<K, V>, key: &K, zero: &V) -> Result<*mut V, Loss> {
    if let Some(value) = map.get_ptr_mut(key) {
        return Ok(value);
    }
    let _ = map.insert(key, zero, u64::from(BPF_NOEXIST));
    map.get_ptr_mut(key).ok_or(Loss::MapFull)
}

/// `-EEXIST`.
const EXISTS: i32 = -17;

/// Inserts what is not there yet. False if it is.
#[inline(always)]
pub fn insert_new<K, V>(map: &HashMap<K, V>, key: &K, value: &V) -> Result<bool, Loss> {
    match map.insert(key, value, u64::from(BPF_NOEXIST)) {
        Ok(()) => Ok(true),
        Err(EXISTS) => Ok(false),
        Err(_) => Err(Loss::MapFull),
    }
}
