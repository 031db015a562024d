//! Tables for people: columns, names, numbers.

/// Known, and there is none.
pub const NONE: &str = "-";
/// Not known.
pub const UNKNOWN: &str = "?";

/// A heading, and rows of cells in columns below it.
pub fn section(lines: &mut Vec<String>, heading: &str, rows: Vec<Vec<String>>) {
    lines.push(heading.to_owned());
    if rows.is_empty() {
        lines.push("  none".to_owned());
    }
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in &rows {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        lines.push(format!("  {}", cells.join("  ").trim_end()));
    }
}

/// A name on one line, with nothing in it that a terminal would obey.
pub fn plain(name: &str) -> String {
    if name.is_empty() || name.trim() != name || name == NONE || name == UNKNOWN {
        return format!("{name:?}");
    }
    let mut shown = String::with_capacity(name.len());
    for character in name.chars() {
        match character {
            '\'' | '"' => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
    }
    shown
}

pub fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut shown = format!("{bytes} B");
    for unit in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        shown = format!("{value:.1} {unit}");
    }
    shown
}

pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.1} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s if s < 360_000.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} d", s / 86400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!([0, 1023, 1024, 921_600, u64::MAX].map(size), ["0 B", "1023 B", "1.0 KiB", "900.0 KiB", "16.0 EiB"]);
        assert_eq!(
            [0.04, 99.0, 600.0, 7200.0, 864_000.0].map(duration),
            ["0.0 s", "99.0 s", "10 min", "2.0 h", "10.0 d"]
        );
    }

    #[test]
    fn names_cannot_be_taken_for_anything_else() {
        assert_eq!(plain("it's \"x\""), "it's \"x\"");
        assert_eq!([plain(""), plain("-"), plain("?"), plain(" x")], ["\"\"", "\"-\"", "\"?\"", "\" x\""]);
        assert_eq!(plain("a\tb\\\u{7f}"), "a\\tb\\\\\\u{7f}");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest() {
        let mut lines = Vec::new();
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        section(&mut lines, "x", vec![row(&["a", "bb", ""]), row(&["ccc", "d"])]);
        section(&mut lines, "y", vec![]);
        assert_eq!(lines, ["x", "  a    bb", "  ccc  d", "y", "  none"]);
    }
}
