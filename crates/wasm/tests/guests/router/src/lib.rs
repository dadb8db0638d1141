//! Chooses as the request's field x-choose says.

wit_bindgen::generate!({ path: "../../../../../plugins/wit", world: "router", generate_all });

struct Probe;

impl Guest for Probe {
    fn choose(request: &RequestHead, targets: Vec<Target>) -> Option<u32> {
        let word = request.header("x-choose").concat();
        match &*String::from_utf8_lossy(&word) {
            "trap" => panic!("as told"),
            "loop" => loop {
                std::hint::black_box(&word);
            },
            "edit" => {
                let refused = request.set_header("x-a", b"1").is_err() && request.set_path("/other").is_err();
                (refused && request.set_note("n", b"1")).then_some(0)
            }
            "healthy" => (0u32..)
                .zip(&targets)
                .find(|(_, t)| t.healthy > 0 && !t.circuit_open)
                .map(|(n, _)| n),
            "service" => (0u32..)
                .zip(&targets)
                .find(|(_, t)| t.service == request.config())
                .map(|(n, _)| n),
            number => number.parse().ok(),
        }
    }
}

export!(Probe);
