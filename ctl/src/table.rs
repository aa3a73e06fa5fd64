//! A plain table: columns two spaces apart, no frame, so that `awk` and eyes can read it.

/// Where a column's text stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Lines of `rows` beneath `titles`; a row shorter than the titles ends early.
pub(crate) fn lines(titles: &[(&str, Align)], rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize, title: &str| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .chain([title.chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> =
        titles.iter().enumerate().map(|(column, (title, _))| width(column, title)).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for ((cell, (_, align)), width) in cells.zip(titles).zip(&widths) {
            if !line.is_empty() {
                line.push_str("  ");
            }
            line.push_str(&match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            });
        }
        line.trim_end().to_owned()
    };
    std::iter::once(line(&mut titles.iter().map(|(title, _)| *title)))
        .chain(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["a".to_owned(), "1".to_owned()], vec!["längst".to_owned(), "1000".to_owned()]];

        let lines = lines(&[("APP", Align::Left), ("N", Align::Right)], &rows);

        assert_eq!(lines, ["APP        N", "a          1", "längst  1000"]);
    }
}
