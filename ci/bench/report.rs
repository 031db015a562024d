//! The table for people.

use std::io::{self, Write};

use anyhow::Result;

use crate::Row;
use crate::budget::Check;

/// Tells on stderr what is being measured. A stderr that is gone is no reason to stop.
pub fn progress(what: &str) {
    let _ = writeln!(io::stderr(), "bench: {what}");
}

/// Prints all rows, and the budgets.
pub fn table(rows: &[Row], checks: &[Check]) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:<15}  {:>9}  {:>8}  {:>13}  {:>10}  {:>10}  {:>11}  {:>9}",
        "", "size", "shown/s", "instr/frame", "calls/fr.", "start, M", "start calls", "peak, MB"
    )?;
    let number = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    for row in rows {
        writeln!(
            out,
            "{:<15}  {:>9}  {:>8}  {:>13.0}  {:>10}  {:>10.1}  {:>11}  {:>9.1}",
            row.program.name(),
            format!("{}x{}", row.width, row.height),
            number(row.shown_per_second, 2),
            row.instructions_per_frame,
            number(row.system_calls_per_frame, 2),
            row.startup_instructions / 1e6,
            number(row.startup_system_calls, 0),
            row.peak_resident_kib as f64 * 1024e-6,
        )?;
    }
    writeln!(out)?;
    for program in crate::programs::Program::ALL {
        writeln!(out, "{:<15}  {}", program.name(), program.what())?;
    }
    if !checks.is_empty() {
        writeln!(out)?;
    }
    for check in checks {
        let verdict = if check.met { "met   " } else { "MISSED" };
        writeln!(out, "{verdict}  {:>7.3} (at most {:.2})  {}", check.measured, check.limit, check.what)?;
    }
    Ok(())
}
