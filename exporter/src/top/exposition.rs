// SPDX-License-Identifier: Apache-2.0
//! How does an exporter's page in the text format become series again?
//!
//! Only what is asked for is taken apart: most lines of a page are buckets that nobody here looks at.

use std::borrow::Cow;

/// One series of a page.
#[derive(Debug, PartialEq)]
pub struct Series<'a> {
    /// The name, with `_bucket`, `_sum` or `_count` of a histogram.
    pub name: &'a str,
    labels: Vec<(&'a str, Cow<'a, str>)>,
    /// What it says.
    pub value: f64,
}

impl Series<'_> {
    /// The value of a label; empty if the series does not have it, as Prometheus reads it.
    pub fn label(&self, name: &str) -> &str {
        let labels = self.labels.iter();
        labels
            .filter(|(label, _)| *label == name)
            .map(|(_, value)| value.as_ref())
            .next()
            .unwrap_or_default()
    }
}

/// The series of a page whose names `wanted` gives something for, with that. A line that is none is passed over.
pub fn series<'a, T: Copy + 'a>(
    page: &'a str,
    wanted: impl Fn(&str) -> Option<T> + 'a,
) -> impl Iterator<Item = (T, Series<'a>)> {
    // Series of one name follow each other.
    let mut last = ("", None);
    page.lines().filter_map(move |line| {
        let end = memchr::memchr2(b'{', b' ', line.as_bytes())?;
        let name = &line[..end];
        if name != last.0 {
            last = (name, wanted(name));
        }
        let for_it = last.1?;
        let (labels, rest) = match line[end..].strip_prefix('{') {
            Some(labels) => read_labels(labels)?,
            None => (Vec::new(), &line[end..]),
        };
        // A time may follow.
        let value = rest.split_whitespace().next()?.parse().ok()?;
        Some((
            for_it,
            Series {
                name,
                labels,
                value,
            },
        ))
    })
}

type Labels<'a> = Vec<(&'a str, Cow<'a, str>)>;

/// What is between the braces, and what follows them.
fn read_labels(mut text: &str) -> Option<(Labels<'_>, &str)> {
    let mut labels = Vec::with_capacity(8);
    loop {
        text = text.trim_start_matches([',', ' ']);
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let at = memchr::memchr(b'=', text.as_bytes())?;
        let (name, rest) = (&text[..at], text[at + 1..].strip_prefix('"')?);
        let end = closing_quote(rest)?;
        labels.push((name, unescaped(&rest[..end])));
        text = &rest[end + 1..];
    }
}

/// Where the quote is that no backslash escapes.
fn closing_quote(text: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + memchr::memchr2(b'"', b'\\', &text.as_bytes()[from..])?;
        if text.as_bytes()[at] == b'"' {
            return Some(at);
        }
        // What is escaped may be the last byte of a line that was cut off.
        from = (at + 2).min(text.len());
    }
}

fn unescaped(value: &str) -> Cow<'_, str> {
    if !value.contains('\\') {
        return Cow::Borrowed(value);
    }
    let mut text = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(c) = characters.next() {
        text.push(match c {
            '\\' => match characters.next() {
                Some('n') => '\n',
                Some(escaped) => escaped,
                None => break,
            },
            c => c,
        });
    }
    Cow::Owned(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_taken_apart() {
        let page = "# HELP a_total Of a.\n# TYPE a_total counter\na_total{pod=\"x,}\\\"\\\\\\n\",n=\"\"} 5\na_total 1e3 1700000000\n\
                    b_total{pod=\"y\"} 7\na_bucket{le=\"+Inf\",} NaN\n";
        let wanted = |name: &str| name.starts_with("a_").then_some(());
        let found: Vec<_> = series(page, wanted).map(|((), found)| found).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].label("pod"), "x,}\"\\\n");
        assert_eq!((found[0].label("n"), found[0].label("none")), ("", ""));
        assert_eq!(found[1].value, 1000.0);
        assert!(found[2].value.is_nan());
    }

    #[test]
    fn what_is_no_series_is_passed_over() {
        for line in [
            "",
            "a",
            "a ",
            "a{",
            "a{b",
            "a{b=\"",
            "a{b=\"c\\",
            "a{b=\"c\\\"",
            "a{b=\"c\"",
            "a{b=\"c\"}",
            "a{b=\"c\"} x",
            "a{b=\"ü\\ü",
            "{} 1 2 ü",
            "<html>",
        ] {
            let wanted = |name: &str| (name == "a").then_some(());
            assert_eq!(series(line, wanted).count(), 0, "{line}");
        }
    }
}
