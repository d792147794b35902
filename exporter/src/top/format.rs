// SPDX-License-Identifier: Apache-2.0
//! How are numbers and names shown to people?

/// A number in at most five characters: 0, 0.04, 4.1, 41, 1.2k, 3M.
pub(super) fn number(value: f64) -> String {
    let (value, unit) = match value.abs() {
        abs if abs < 999.5 => (value, ""),
        abs if abs < 999.5e3 => (value / 1e3, "k"),
        abs if abs < 999.5e6 => (value / 1e6, "M"),
        abs if abs < 999.5e9 => (value / 1e9, "G"),
        _ => (value / 1e12, "T"),
    };
    match value.abs() {
        0.0 => "0".to_owned(),
        abs if abs < 0.01 => "<0.01".to_owned(),
        abs if abs < 0.095 => format!("{value:.2}{unit}"),
        abs if abs < 9.95 => {
            let text = format!("{value:.1}");
            // What is whole has no digits behind it.
            format!("{}{unit}", text.trim_end_matches(".0"))
        }
        _ => format!("{value:.0}{unit}"),
    }
}

/// A time in at most six characters: 0, 12us, 4.1ms, 41s, 12m, 3h.
pub(super) fn time(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s <= 0.0 => return "0".to_owned(),
        s if s < 999.5e-6 => (s * 1e6, "us"),
        s if s < 0.9995 => (s * 1e3, "ms"),
        s if s < 99.5 => (s, "s"),
        s if s < 5970.0 => (s / 60.0, "m"),
        s => (s / 3600.0, "h"),
    };
    format!("{}{unit}", number(value))
}

/// A share: 92%.
pub(super) fn share(of_one: f64) -> String {
    format!("{:.0}%", of_one * 100.0)
}

/// A name from elsewhere, with nothing in it that a terminal would act on: control characters, and those that turn the direction of text.
pub(super) fn visible(name: &str) -> String {
    let is_acted_on = |c: char| {
        c.is_control()
            || matches!(
                c,
                '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
                    | '\u{e0000}'..='\u{e007f}'
            )
    };
    let shown = |c| if is_acted_on(c) { '\u{fffd}' } else { c };
    name.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown = [
            0.0, 0.001, 0.042, 0.5, 4.12, 9.0, 41.4, 1234.0, 999_900.0, 2.5e9,
        ];
        let texts = shown.map(number);
        assert_eq!(
            texts,
            [
                "0", "<0.01", "0.04", "0.5", "4.1", "9", "41", "1.2k", "1M", "2.5G"
            ]
        );
        let shown = [0.0, 12e-6, 0.0041, 0.0655, 41.0, 300.0, 7200.0];
        assert_eq!(
            shown.map(time),
            ["0", "12us", "4.1ms", "66ms", "41s", "5m", "2h"]
        );
    }

    #[test]
    fn names_cannot_act_on_the_terminal() {
        assert_eq!(
            visible("a\x1b[2Jb\nc\u{202e}"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}"
        );
        assert_eq!(visible("चन्द्र 容器🔭"), "चन्द्र 容器🔭");
    }
}
