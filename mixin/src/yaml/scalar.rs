// SPDX-License-Identifier: Apache-2.0
//! What does Helm's own reader make of a scalar?

use granit_parser::{ScalarStyle, Tag};
use serde_json::{Number, Value};

/// What Helm's reader makes of a scalar.
pub(super) fn meaning(text: &str, style: ScalarStyle, tag: Option<&Tag>, nothing: bool) -> Value {
    if nothing && style == ScalarStyle::Plain {
        return Value::Null;
    }
    let string = || Value::String(text.to_owned());
    match tag.and_then(Tag::core_suffix) {
        Some("int" | "float" | "bool" | "null") => plain(text),
        Some(_) => string(),
        None if tag.is_some() || style != ScalarStyle::Plain => string(),
        None => plain(text),
    }
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return Value::Bool(true);
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

/// YAML 1.1: underscores, `0x`, `0b`, `0o` and a leading zero.
fn number(text: &str) -> Option<Number> {
    let digits = text.replace('_', "");
    let (negative, unsigned) = match digits.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, digits.strip_prefix('+').unwrap_or(&digits)),
    };
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let lower = unsigned.to_ascii_lowercase();
    let radix = |digits: &str, radix| u64::from_str_radix(digits, radix).ok();
    let whole = match lower.get(..2) {
        Some("0x") => radix(&lower[2..], 16),
        Some("0b") => radix(&lower[2..], 2),
        Some("0o") => radix(&lower[2..], 8),
        _ if lower.len() > 1 && lower.starts_with('0') => {
            radix(&lower[1..], 8).or_else(|| lower.parse().ok())
        }
        _ => lower.parse().ok(),
    };
    if let Some(whole) = whole {
        return match negative {
            true => Some(Number::from(0_i64.checked_sub_unsigned(whole)?)),
            false => Some(Number::from(whole)),
        };
    }
    if !lower
        .chars()
        .all(|c| c.is_ascii_digit() || ".e+-".contains(c))
    {
        return None;
    }
    Number::from_f64(digits.parse().ok()?)
}
