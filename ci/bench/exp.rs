//! x
#[allow(dead_code)]
mod measure;
use std::io::Write;
fn main() {
    let a: Vec<String> = std::env::args().skip(1).collect();
    let n: u32 = a[0].parse().unwrap(); let reps: u32 = a[1].parse().unwrap();
    let cmd = |f: u32| -> Vec<String> { a[2..].iter().map(|s| s.replace("@", &f.to_string())).collect() };
    let s: Vec<u64> = (0..4).map(|_| measure::run(&cmd(60)).unwrap().cpu_ns).collect();
    let m = *s.iter().min().unwrap();
    writeln!(std::io::stdout(), "short {s:?}").unwrap();
    for i in 0..reps {
        std::thread::sleep(std::time::Duration::from_micros(10_000 + 1667 * i as u64));
        let c = measure::run(&cmd(n)).unwrap().cpu_ns;
        writeln!(std::io::stdout(), "{:.0}", (c as f64 - m as f64) / (n - 60) as f64).unwrap();
    }
}
